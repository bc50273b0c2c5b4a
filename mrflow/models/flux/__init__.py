"""FLUX.1: transformer, autoencoder, text encoders, weights, backbone and facts."""

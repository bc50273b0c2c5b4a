"""Qwen-Image: transformer, autoencoder, text encoder, weights, backbone and facts."""

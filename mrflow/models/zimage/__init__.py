"""Z-Image: transformer, text encoder, weights, backbone and facts; its autoencoder is FLUX's."""

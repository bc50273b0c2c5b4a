"""Where parts of different authors meet: upscalers, decoders, fields in tokens, a transformer's pieces, policies."""

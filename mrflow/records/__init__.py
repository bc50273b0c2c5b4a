"""What a picture carries and what is kept: chains as plain data, files that appear whole, the cache of stages."""

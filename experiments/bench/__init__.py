"""Speed and memory held against diffusers, by one protocol."""

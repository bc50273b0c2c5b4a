"""mrflow against real trained networks, photographs and a real text reader, all of which packages ship."""

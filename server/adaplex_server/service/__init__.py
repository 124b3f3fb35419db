"""What both skins share in the API process: resolving names, text in and out, limits, the engine's supervision."""

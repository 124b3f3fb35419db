"""Between the skins and the engine: text, names, admission, streams, supervision, metrics."""

"""What an adapter is: its spec, formats, identity, durable store, training and merging."""

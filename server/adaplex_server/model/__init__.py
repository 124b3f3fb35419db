"""One decoder, families as data, base formats, and the device memory that a forward touches."""

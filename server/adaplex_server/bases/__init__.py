"""Where a base comes from: a folder, the hub, or the embedded demo model in the user's cache."""

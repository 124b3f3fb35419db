"""What a run leaves for people: a model card, plots and a page that a browser opens, beside the adapter's files."""

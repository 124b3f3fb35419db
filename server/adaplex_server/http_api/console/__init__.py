"""The console: a page at / that uses the public API and nothing else."""

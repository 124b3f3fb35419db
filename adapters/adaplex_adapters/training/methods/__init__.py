"""The kinds of adapters that can be trained: each puts fresh float32 weights around a frozen base and knows how its
files look.
"""

"""A training pass with few launches and little kept: the frozen linears with their LoRAs, what lies between them, and
the loss, each with a gradient of its own.
"""

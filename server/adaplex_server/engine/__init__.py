"""The engine process: queue, pages, slots, steps, sampling, and the frames it speaks."""

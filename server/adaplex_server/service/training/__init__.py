"""Training as a service: files, durable jobs, and the process that trains beside the engine."""

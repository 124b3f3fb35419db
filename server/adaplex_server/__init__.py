"""What answers requests: HTTP and gRPC APIs, engine, model, kernels, command line."""

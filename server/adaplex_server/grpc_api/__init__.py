"""adaplex.v1 over gRPC, a thin skin over service."""

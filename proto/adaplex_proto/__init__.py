"""The gRPC contract `adaplex.v1` and its generated stubs."""

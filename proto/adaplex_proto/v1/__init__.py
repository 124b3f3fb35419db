"""adaplex.v1: the .proto and what is generated from it by `make proto`; nothing here is written by hand."""

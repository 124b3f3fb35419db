"""Adaplex as a Ray Serve application (`adaplex[ray]`): several replicas, each request at one that holds its adapter.

    Ray's HTTP proxy → Gateway (reads the model's name) → Ray's router (by multiplexed model id) → Replica (a Service)

Every replica is a whole server of its own, with an engine process. What they share is the adapter folder: a name that
appears there is served by whichever replica is asked for it first, without a restart.
"""

"""The science of the update: pure functions from arrays to arrays."""

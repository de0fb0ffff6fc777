"""jobctl: the client of gpujobd. Imports gpujobd.protocol and nothing else of the daemon."""

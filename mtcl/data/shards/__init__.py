"""Training samples in tar files (shards), for datasets that lie in object storage and are read by many machines."""

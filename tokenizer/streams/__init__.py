"""Images in tar and parquet shards that are read one after another, from disks or through the network."""

"""From folders, lists and archives to a manifest: listing, probing, statistics, shards."""

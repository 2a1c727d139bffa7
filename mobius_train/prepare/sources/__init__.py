"""Sources of clips: folders, lists, archives, shards. They do not decode anything."""

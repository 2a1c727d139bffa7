"""Sources of clips: folders, lists, archives, shards. They decode nothing."""

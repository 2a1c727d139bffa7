"""Where clips come from: folders, lists, archives, shards. Nothing is decoded here."""

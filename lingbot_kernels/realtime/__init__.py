"""What lives between chunks: a session's caches and its position. Nothing here launches a kernel."""

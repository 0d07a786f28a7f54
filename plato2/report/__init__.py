"""One page from what lies in folders: runs, the curriculum, evaluations."""

"""What several tests share: tiny models, adapters, servers and their twins."""

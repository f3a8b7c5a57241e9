"""The doctor: how engines serve adapters rightly, or why they would not."""

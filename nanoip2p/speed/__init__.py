"""The same networks, faster."""

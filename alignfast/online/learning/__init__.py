"""What votes teach: rewards, whether a candidate may go before people, and how certain it is that they like it."""

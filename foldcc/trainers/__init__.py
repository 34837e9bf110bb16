"""Other people's training loops with folded models, each in the file of its library, which has to be installed."""

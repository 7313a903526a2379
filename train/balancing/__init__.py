"""The balancing axis: what do loss and gradients do for the modality that lags behind?"""

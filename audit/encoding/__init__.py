"""One modality of one sample as a feature vector, encoded once"""

"""`neox quickstart`: from the text that an install brings to a trained model, with no network.

Parts, each usable alone: corpus (the text), baselines (what compressors make of it), machine (what this computer can
train and run), curve (the loss as a picture), flipbook (a page in which one watches the model learn).
"""

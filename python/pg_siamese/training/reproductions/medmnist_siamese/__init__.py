"""The Siamese network on MedMNIST: which of four data sets is an image from?"""

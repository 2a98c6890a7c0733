"""The paper's claim at small scale: does the image memory help when text lies between?"""

"""The study of backbones: the same training with each of them, measured and reported.

plan          which runs there are to be, and which lack their weights
runner        trains and measures them, one after the other, going on where it stopped
measurement   what is kept of a run: `measurement.json` and `pictures.npz`
statistics    intervals over subjects and seeds, and many tests at once
claims        what the document predicts, as hypotheses, and how each is judged
results       the runs of a study, read and summed up row by row
report        the tables, the decision matrix and the words
figures       the pictures
writing       HTML, Markdown, JSON
"""

"""Procedural scenes: drawings of shapes, digits and letters with captions, questions and zero-shot tasks.

`domains` names what there is, `sampling` draws attributes, `render` pixels, `language` puts objects into words,
`questions` asks about them in the words of `phrasings`, `captions` are tensors, `tasks` are zero-shot tasks, `export`
writes a data set.
"""

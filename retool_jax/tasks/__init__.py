"""Problems, their gold answers and the judge: readers, the embedded task, answer equality, the grader."""

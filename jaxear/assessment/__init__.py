"""What `jaxear evaluate` measures: reconstruction, codes, recognition, time; model beside PCA."""

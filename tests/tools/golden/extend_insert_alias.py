from platforms import DiffusionTestCase as C

ONE_GPU_CASES = [C("a")]
B = ONE_GPU_CASES
B.append(C("b"))
ONE_GPU_CASES.extend([C("c")])
ONE_GPU_CASES.insert(0, C("first"))
ONE_GPU_CASES += (C("d"),)
ONE_GPU_CASES = ONE_GPU_CASES + [*B[:1], C("e")][1:]
B.append(C("lost"))
TWO_GPU_CASES = [*[C("t1")], C("t2")]

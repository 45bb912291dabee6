"""What makes XLA compile fast, where the speed of the program does not matter."""

from jaxlib.version import __version_info__

FLAGS = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0 "
FLAGS += "--xla_cpu_parallel_codegen_split_count=1"
if __version_info__ < (0, 11):  # later versions know no other way, and stop at the flag
    FLAGS += " --xla_cpu_use_fusion_emitters=false"

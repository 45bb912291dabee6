"""What makes XLA compile fast, where the speed of the program does not matter."""

FLAGS = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"

# Third-party headers come with the build requirements in pyproject.toml; none is committed.

# pybind11: the Python package carries its CMake files.
if(NOT pybind11_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
                  OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "pybind11 is missing for ${Python_EXECUTABLE}: pip install 'pybind11>=3.0'")
  endif()
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 3.0 REQUIRED CONFIG)

# dlpack/dlpack.h 1.3 or newer: in the apache-tvm-ffi package, which is located, not imported.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u; print(u.find_spec('tvm_ffi').submodule_search_locations[0])"
  OUTPUT_VARIABLE tvm_ffi_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_path(DLPACK_INCLUDE_DIR dlpack/dlpack.h
          PATHS ${tvm_ffi_root}/include ${tvm_ffi_root}/3rdparty/dlpack/include NO_DEFAULT_PATH)
if(NOT DLPACK_INCLUDE_DIR)
  message(FATAL_ERROR "dlpack/dlpack.h is missing for ${Python_EXECUTABLE}: pip install 'apache-tvm-ffi>=0.1.11'")
endif()
add_library(dlpack_headers INTERFACE)
target_include_directories(dlpack_headers SYSTEM INTERFACE ${DLPACK_INCLUDE_DIR})

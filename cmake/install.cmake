# What other programs get: headers, both libraries, find_package and pkg-config. A wheel has all of it
# inside the package's own directory (python -m mixedkv.config says where), and no symbolic links:
# there, the shared library is one file, and a linker script of its plain name leads to it.

include(CMakePackageConfigHelpers)

install(DIRECTORY include/mixedkv DESTINATION ${mixedkv_includedir} FILES_MATCHING PATTERN "*.h")

if(SKBUILD)
  set(namelink NAMELINK_SKIP)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    file(WRITE ${PROJECT_BINARY_DIR}/wheel/libmixedkv.so "INPUT(libmixedkv.so.${mixedkv_soversion})\n")
    install(FILES ${PROJECT_BINARY_DIR}/wheel/libmixedkv.so DESTINATION ${mixedkv_libdir})
  endif()
else()
  set(namelink "")
endif()
install(TARGETS mixedkv mixedkv_static EXPORT mixedkvTargets
  RUNTIME DESTINATION ${mixedkv_bindir}
  LIBRARY DESTINATION ${mixedkv_libdir} ${namelink}
  ARCHIVE DESTINATION ${mixedkv_libdir})

set(cmake_dir ${mixedkv_libdir}/cmake/mixedkv)
install(EXPORT mixedkvTargets NAMESPACE mixedkv:: DESTINATION ${cmake_dir})
configure_package_config_file(cmake/mixedkvConfig.cmake.in
  ${PROJECT_BINARY_DIR}/mixedkvConfig.cmake INSTALL_DESTINATION ${cmake_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/mixedkvConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/mixedkvConfig.cmake
  ${PROJECT_BINARY_DIR}/mixedkvConfigVersion.cmake DESTINATION ${cmake_dir})

# The .pc file finds its prefix from where it lies, so that the tree may be moved.
set(pc_dir ${mixedkv_libdir}/pkgconfig)
file(RELATIVE_PATH mixedkv_prefix_from_pc /prefix/${pc_dir} /prefix)
configure_file(cmake/mixedkv.pc.in ${PROJECT_BINARY_DIR}/mixedkv.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/mixedkv.pc DESTINATION ${pc_dir})

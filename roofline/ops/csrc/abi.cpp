// The version of the C ABI between this library and Python: raised with every change of a signature,
// so that a stale library is refused instead of called wrongly.

#if defined(_WIN32)
#define ROOFLINE_EXPORT extern "C" __declspec(dllexport)
#else
#define ROOFLINE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

ROOFLINE_EXPORT int roofline_abi_version() { return 1; }

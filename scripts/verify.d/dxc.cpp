// Compiles HLSL to DXIL with libdxcompiler on Linux, many files in one process, with the arguments that wgpu 30 gives to DXC.
//
//     dxc LIBDXCOMPILER [OUTPUT_FOLDER]
//
// reads a line "FILE <tab> ENTRY <tab> TARGET" a shader from stdin (TARGET as cs_6_0; with "+16" after it, 16-bit types are on, as on
// devices with shader-f16) and answers each with "ok <tab> FILE <tab> BYTES" or "FAILED <tab> FILE <tab> MESSAGE", line breaks of the
// message as " | ". The first line is "version <tab> MAJOR.MINOR". As in wgpu, any message at all is a failure. The library validates
// the DXIL that it writes. Exit status: 0 all compiled, 1 some did not, 2 nothing could be compiled.
//
// Build beside WinAdapter.h and dxcapi.h of DirectXShaderCompiler: c++ -O1 -w -o dxc dxc.cpp -ldl
#define __EMULATE_UUID 1
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cwchar>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "WinAdapter.h"
#include "dxcapi.h"

static std::wstring wide(const std::string &text) { return std::wstring(text.begin(), text.end()); }

static std::string one_line(const std::string &text) {
    std::string line;
    for (char c : text) {
        if (c == '\n') line += " | ";
        else line += c == '\t' || c == '\r' ? ' ' : c;
    }
    return line;
}

// What a compiler without Microsoft's dxil library beside it says of every shader: that library signs, and there is none for
// Linux. The validator is the one inside libdxcompiler.
static const std::string UNSIGNED =
    "warning: DXIL.dll not found.  Resulting DXIL will not be signed for use in release environments.";

static std::string without_unsigned(std::string text) {
    const size_t at = text.find(UNSIGNED);
    if (at != std::string::npos) text.erase(at, UNSIGNED.size());
    return text.find_first_not_of("\r\n ") == std::string::npos ? "" : text;
}

// The DXIL of one shader, or why there is none.
static bool compile(IDxcCompiler3 *compiler, const std::string &file, const std::string &entry, std::string target,
                    std::string &result) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) {
        result = "cannot be read";
        return false;
    }
    std::stringstream buffer;
    buffer << stream.rdbuf();
    const std::string source = buffer.str();
    const size_t plus = target.find("+16");
    target = target.substr(0, plus);
    std::vector<std::wstring> given = {L"-E",  wide(entry), L"-T",           wide(target),
                                       L"-HV", L"2018",     L"-no-warnings", L"-Ges"};
    if (plus != std::string::npos) given.push_back(L"-enable-16bit-types");
    std::vector<LPCWSTR> arguments;
    for (const std::wstring &argument : given) arguments.push_back(argument.c_str());
    const DxcBuffer text{source.data(), source.size(), DXC_CP_UTF8};
    IDxcResult *compiled = nullptr;
    if (compiler->Compile(&text, arguments.data(), arguments.size(), nullptr, __uuidof(IDxcResult), (void **)&compiled) < 0 ||
        !compiled) {
        result = "the compiler gave no result";
        return false;
    }
    HRESULT status = -1;
    compiled->GetStatus(&status);
    IDxcBlobUtf8 *messages = nullptr;
    compiled->GetOutput(DXC_OUT_ERRORS, __uuidof(IDxcBlobUtf8), (void **)&messages, nullptr);
    const std::string said =
        without_unsigned(messages ? std::string(messages->GetStringPointer(), messages->GetStringLength()) : "");
    IDxcBlob *object = nullptr;
    compiled->GetOutput(DXC_OUT_OBJECT, __uuidof(IDxcBlob), (void **)&object, nullptr);
    const bool whole = object && object->GetBufferSize() > 4 && memcmp(object->GetBufferPointer(), "DXBC", 4) == 0;
    const bool good = status >= 0 && said.empty() && whole;
    if (good) result.assign((const char *)object->GetBufferPointer(), object->GetBufferSize());
    else result = !said.empty() ? said : "no DXIL, status " + std::to_string(status);
    if (object) object->Release();
    if (messages) messages->Release();
    compiled->Release();
    return good;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: dxc LIBDXCOMPILER [OUTPUT_FOLDER] < list\n");
        return 2;
    }
    void *library = dlopen(argv[1], RTLD_NOW);
    auto create = library ? (DxcCreateInstanceProc)dlsym(library, "DxcCreateInstance") : nullptr;
    if (!create) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    IDxcCompiler3 *compiler = nullptr;
    if (create(CLSID_DxcCompiler, __uuidof(IDxcCompiler3), (void **)&compiler) < 0) {
        fprintf(stderr, "%s: no IDxcCompiler3\n", argv[1]);
        return 2;
    }
    UINT32 major = 0, minor = 0;
    IDxcVersionInfo *version = nullptr;
    if (compiler->QueryInterface(__uuidof(IDxcVersionInfo), (void **)&version) >= 0 && version) version->GetVersion(&major, &minor);
    printf("version\t%u.%u\n", major, minor);
    bool failed = false;
    std::string line;
    while (std::getline(std::cin, line)) {
        std::stringstream fields(line);
        std::string file, entry, target, result;
        std::getline(fields, file, '\t');
        std::getline(fields, entry, '\t');
        std::getline(fields, target, '\t');
        if (!compile(compiler, file, entry, target, result)) {
            failed = true;
            printf("FAILED\t%s\t%s\n", file.c_str(), one_line(result).c_str());
        } else {
            printf("ok\t%s\t%zu\n", file.c_str(), result.size());
            if (argc > 2) {
                const std::string name = file.substr(file.rfind('/') + 1);
                std::ofstream(std::string(argv[2]) + "/" + name + ".dxil", std::ios::binary).write(result.data(), result.size());
            }
        }
        fflush(stdout);
    }
    return failed ? 1 : 0;
}

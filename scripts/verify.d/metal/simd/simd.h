// Metal's own header of this name adds nothing that naga's output uses: see metal_stdlib.
#pragma once

// Cosine and sine of an angle in double, for angles far beyond the table of any video: straight-line code, no memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "ring.h"

namespace lingbot::cuda {

constexpr double kMaxAngle = 1125899906842624.0;  // 2^50: below it the quotient by pi / 2 is exact enough

// For |x| < kMaxAngle, to about 1 ulp of double. x = k * pi/2 + r with pi/2 in three doubles: the first product is
// exact in the fma, so nothing is lost where x is near a multiple of pi/2. Then Taylor series on |r| <= pi/4, whose
// first omitted terms are below 1e-16 of the result.
LINGBOT_HOST_DEVICE void cos_sin(double x, double* cos_x, double* sin_x) {
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  constexpr double kPio2[3] = {0x1.921fb54442d18p+0, 0x1.1a62633145c07p-54, -0x1.f1976b7ed8fbcp-110};
  const double k = rint(x * kTwoOverPi);
  double r = fma(-k, kPio2[0], x);
  r = fma(-k, kPio2[1], r);
  r = fma(-k, kPio2[2], r);

  const double z = r * r;
  double s = -1.0 / 1307674368000.0;  // -1/15!
  s = fma(s, z, 1.0 / 6227020800.0);  // 1/13!
  s = fma(s, z, -1.0 / 39916800.0);   // -1/11!
  s = fma(s, z, 1.0 / 362880.0);      // 1/9!
  s = fma(s, z, -1.0 / 5040.0);       // -1/7!
  s = fma(s, z, 1.0 / 120.0);         // 1/5!
  s = fma(s, z, -1.0 / 6.0);          // -1/3!
  s = fma(s * z, r, r);
  double c = 1.0 / 20922789888000.0;    // 1/16!
  c = fma(c, z, -1.0 / 87178291200.0);  // -1/14!
  c = fma(c, z, 1.0 / 479001600.0);     // 1/12!
  c = fma(c, z, -1.0 / 3628800.0);      // -1/10!
  c = fma(c, z, 1.0 / 40320.0);         // 1/8!
  c = fma(c, z, -1.0 / 720.0);          // -1/6!
  c = fma(c, z, 1.0 / 24.0);            // 1/4!
  c = fma(c, z, -0.5);
  c = fma(c, z, 1.0);

  const int64_t quadrant = static_cast<int64_t>(k);
  const double even = quadrant & 1 ? s : c, odd = quadrant & 1 ? c : s;  // cos and sin but for the sign
  *cos_x = (quadrant + 1) & 2 ? -even : even;
  *sin_x = quadrant & 2 ? -odd : odd;
}

}  // namespace lingbot::cuda
